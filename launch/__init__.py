"""Takes a training to machines and keeps it going: `python -m launch create`, `babysit`, ...; see docs/launch.md."""
