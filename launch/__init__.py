"""Takes a training to machines and keeps it going: `python -m launch create`, `babysit`, `status`; see docs/launch.md."""
