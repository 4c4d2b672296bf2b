"""One machine: the supervisor and the demo."""
