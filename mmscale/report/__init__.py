"""Where a run's figures go: the metrics log, the console, sinks, pictures and the HTML page."""
