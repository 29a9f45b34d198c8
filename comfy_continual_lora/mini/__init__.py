"""The mini-SD: a miniature Stable Diffusion, pretrained on a drawn world and shipped with the package.

world (looks, drawing)                    the images it was trained on
parts                                     its nets
pretrain (trainset, training, stages)     the training recipe
weights                                   the shipped files <-> a checkpoint file
"""
