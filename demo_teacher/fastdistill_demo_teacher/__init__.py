"""The teacher of `fastdistill demo`: a small Llama trained on Python source, in checkpoint/."""
