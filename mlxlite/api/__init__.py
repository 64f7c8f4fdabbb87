"""The API: JSON to requests, events to answers; one file for each group of endpoints."""
