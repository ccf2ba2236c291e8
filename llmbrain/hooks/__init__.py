"""The only place that listens to or changes a running model: sites, listening, changing, text as tokens."""
