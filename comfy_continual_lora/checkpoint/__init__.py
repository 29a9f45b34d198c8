"""Stage 1: a checkpoint as people own it -> `Backbone`, offline.

in: a single .safetensors file in the LDM layout, Anima's three, or a diffusers folder - out:
`Backbone` (encode images, encode prompts, predict).
"""
