"""The only place that runs a frozen network: runtimes, runner, pooling, the stream of images."""
