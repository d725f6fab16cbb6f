"""The demonstration: a Gradio app on the package's public API, for `spar demo` and for a Space."""
