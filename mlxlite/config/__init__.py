"""Configuration: every flag once, from the command line and the environment."""
