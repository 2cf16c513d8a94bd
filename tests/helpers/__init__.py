"""What several tests use: models and data, runs, processes that start, race and get killed."""
