"""Cost of the jobs at any size, derived from measured constants, and what breaks first."""
