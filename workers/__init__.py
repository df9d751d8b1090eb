"""Editing streams: everything that touches a language model, and nothing that touches Ray, Arrow or the orchestrator.

Tensor names carry their axes as a suffix of capital letters:

====  ==========================================================
 B    rows of a batch (one tokenised sequence each)
 S    positions of a padded sequence
 L    lanes (independent edit states on one shared base model)
 O    output features of a linear map
 I    input features of a linear map
 D    hidden size
 V    vocabulary
 K    entries of a codebook
 R    rows of one lane in an edit batch
====  ==========================================================
"""
