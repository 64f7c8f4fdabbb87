"""HTTP/1.1 over asyncio: bytes to requests, answers to bytes; no JSON fields and no models.

Decides how long a peer may take, how much of it is held in memory, and when a connection is cut.
Every request gets one answer; after a disconnect the application is notified at once. Never waits,
never holds more than its bounds, and knows its application by three methods.
"""
