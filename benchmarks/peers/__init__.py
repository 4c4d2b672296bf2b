"""The engines beside ours, each measured in a process of its own on the same weights and the same token ids.

`protocol` is what every one of them is asked and answers, `gguf_file` writes our weights for llama.cpp.
Install them into the checkout's environment with `pip install -e '.[peers]'`.
"""
