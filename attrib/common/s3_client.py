"""The s3fs client. A failed request is repeated in one layer, so that a job ends within the limits of its settings.

s3fs repeats by itself five times what botocore has already repeated `max_attempts` times, and reading twenty-five
times: while a store throttles all requests, each call then takes minutes.
"""

from typing import Any

import s3fs
from botocore.exceptions import ClientError, HTTPClientError
from fsspec.asyn import sync_wrapper
from s3fs.errors import translate_boto_error

from attrib.common.settings import StorageSettings


class _S3FileSystem(s3fs.S3FileSystem):  # type: ignore[misc]  # untyped
    """botocore repeats requests, with pauses. s3fs repeats only the reading of an answer that breaks off."""

    async def _call_s3(self, method: str, *argument_dicts: dict[str, Any], **arguments: Any) -> Any:
        """One request. Raises OSError, which s3fs does not repeat, also for what botocore raises of its own."""
        await self.set_session()
        call = getattr(await self.get_s3(arguments.get("Bucket")), method)
        try:
            return await call(**self._get_s3_method_kwargs(call, *argument_dicts, **arguments))
        except ClientError as error:
            message = error.response["Error"].get("Message", error)
            raise translate_boto_error(error, f"{message} ({_named(method, arguments)})") from error
        except HTTPClientError as error:  # no answer: refused, reset or timed out
            raise ConnectionError(f"{error} ({_named(method, arguments)})") from error

    call_s3 = sync_wrapper(_call_s3)


def _named(method: str, arguments: dict[str, Any]) -> str:
    return f"{method} of s3://{arguments.get('Bucket', '')}/{arguments.get('Key', arguments.get('Prefix', ''))}"


def s3_client(settings: StorageSettings) -> s3fs.S3FileSystem:
    """s3fs's file system, without a cache of listings."""
    client = _S3FileSystem(
        endpoint_url=settings.endpoint,
        client_kwargs={"region_name": settings.region} if settings.region else {},
        config_kwargs={
            "retries": {"total_max_attempts": settings.max_attempts, "mode": "standard"},
            "connect_timeout": settings.connect_timeout_seconds,
            "read_timeout": settings.request_timeout_seconds,
        },
    )
    client.use_listings_cache = client.dircache.use_listings_cache = False
    client.retries = settings.max_attempts
    return client
