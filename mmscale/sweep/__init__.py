"""Search of settings: many trainings, the best of a metric."""
