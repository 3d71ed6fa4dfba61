"""The whole flow on drawn images, with generators whose true sources are known."""
