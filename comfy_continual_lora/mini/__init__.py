"""The mini-SD: a miniature Stable Diffusion, pretrained on a drawn world and shipped with the package.

world (looks, drawing)                    what it has seen
parts                                     its nets
pretrain (trainset, training, stages)     the recipe
weights                                   the shipped files <-> a checkpoint file
"""
