"""Fewer bytes for each masked weight: halves for what is frozen, steps tensor by tensor, scores in bf16.

held        matrices under masks in bf16, with the fingerprint of the weights as they came
by_tensor   scores stepped one tensor after the other, in backward where that is possible
sgd         SGD that keeps momentum in bf16, and rounds scores in bf16 at random
"""
