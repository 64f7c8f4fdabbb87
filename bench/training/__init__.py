"""Training of the two small models in this repository; nothing here is measured."""
