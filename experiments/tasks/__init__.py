"""Tasks of the command line, one per file, each with `run(config, overrides)`. Their keys are in conf/task."""
