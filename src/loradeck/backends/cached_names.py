"""What lies in the cache of stores elsewhere, by the URLs that people know it by."""

import re
from pathlib import Path

from loradeck.disk import cache_folder

URLS: dict[str, str] = {}  # of each folder of the cache that this process used: URL/NAME@NUMBER


def cached_adapters() -> Path:
    """Return the cache's folder."""
    return (cache_folder() / "adapters").absolute()


def with_urls(text: str) -> str:
    """Return a text with URL/NAME@NUMBER in place of folders in the cache."""
    if not URLS:
        return text
    folder = re.escape(str(cached_adapters())) + r"/([0-9a-f]{64}-\d+)"
    return re.sub(folder, lambda match: URLS.get(match[1], match[0]), text)
