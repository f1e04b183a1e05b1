"""Where a run's figures go: the metrics log, the console, wandb, pictures and the HTML page."""
