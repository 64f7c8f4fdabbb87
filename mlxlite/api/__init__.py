"""The API: JSON bodies to requests, events to answers; one file for each dialect.

A dialect is a table of fields, a parser and a writer; router, OpenAPI document, metrics and docs
read the same `Endpoint` records. A field is supported, changes nothing, or is refused by name:
nothing is dropped in silence. Never blocks the event loop on parsing or rendering.
"""
