"""The command line `spar`: one file for each command, with `HELP`, `EPILOG`, `add_arguments(parser)` and `run(args)`.

A package beside `spar_hf` and not inside it, for importing `spar_hf` loads torch and transformers. Here that happens
in `run`, so that help and mistakes on the line are answered at once.
"""
