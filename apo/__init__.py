"""The library behind the command lines: nothing here is run, and nothing here imports a file above it."""
