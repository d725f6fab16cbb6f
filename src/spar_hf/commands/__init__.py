"""The commands of `spar`, one file each: `HELP`, `EPILOG`, `add_arguments(parser)` and `run(args)`.

Nothing heavy is imported before `run`, so that help and mistakes on the line are answered at once.
"""
