"""Editing streams: everything that touches a language model, and nothing that touches Ray, Arrow or
the orchestrator.

Tensor names carry their axes as a suffix of capital letters; 1 is an axis of one element:

====  ============================================================================================
 A    texts that a training step compares with its edits (SERAC)
 B    rows of a batch (one tokenised sequence each)
 C    clusters (MELO)
 D    hidden size
 E    edit rows of a batch whose activations a margin compares (WISE), or pairs in scope (SERAC)
 F    features of a gradient pair: input and output features side by side
 G    unrelated rows of a batch, beside the edit rows (WISE)
 H    rows of a batch that hit an entry (MELO)
 I    input features of a linear map
 J    entries of a codebook, key list or memory; candidates of a draw; memories of a merge
 K    lanes that are left in the batch of a descent
 L    lanes (independent edit states on one shared base model)
 M    columns of a solve, or entries kept in a list of keys
 N    tokens or requests, flattened over lanes and rows
 O    output features of a linear map
 P    positions that a loss or a score reads
 R    rows of one lane in an edit batch, or rows that are kept; the rank of an adapter
 S    positions of a padded sequence
 V    vocabulary
 X    any further axes
====  ============================================================================================
"""
