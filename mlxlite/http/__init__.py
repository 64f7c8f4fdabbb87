"""HTTP/1.1: bytes to requests and answers to bytes, over asyncio; no JSON and no models."""
