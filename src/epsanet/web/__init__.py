"""The page: pictures in, what a network makes of them out. Built on Gradio; the extra is ``web``."""
