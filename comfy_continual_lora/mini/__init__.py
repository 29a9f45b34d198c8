"""The mini-SD: a miniature Stable Diffusion pretrained here on a drawn world, shipped with the
package.

world.py what it has seen - parts.py its nets - pretrain.py the recipe - weights.py the shipped
files <-> a checkpoint file.
"""
