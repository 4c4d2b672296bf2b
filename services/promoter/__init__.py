"""The only writer of the pointer."""
