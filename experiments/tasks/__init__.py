"""One task of the command line per file, each with `run(config, overrides)`. Its keys are in conf/task."""
