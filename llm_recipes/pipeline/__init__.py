"""Training of models that no process holds whole: pipeline stages, tensor and expert parallel, FSDP2, and all of them at once.

`sharding` splits an unmodified model of transformers over a mesh, `stages` cuts it into pipeline stages, `driving` lets a
Trainer train it. docs/parallelism.md says when to use what.
"""
