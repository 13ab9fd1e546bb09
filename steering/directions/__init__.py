"""Methods to find a direction, one per file; each returns a `SteeringVector` in the model's own units.

feature.py a dictionary feature · actadd.py a pair of prompts · diffmean.py a difference of means · pca.py principal components ·
iti.py attention heads chosen by probes · random.py controls · contrast.py and texts.py hold what several of them share
"""
