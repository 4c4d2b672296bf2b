pytest_plugins = ["tests.compiled", "tests.servers"]
