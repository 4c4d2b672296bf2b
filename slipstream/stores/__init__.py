"""Where facts live between processes: the observation log, the model registry and the pointer store."""
