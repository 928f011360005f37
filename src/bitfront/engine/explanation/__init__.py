"""What the stored trials of a run tell: what options cost and buy, why a trial has its options, prices, the gap.

``explain.py`` has the verb, ``results.py`` what it returns. ``model.py`` fits the surrogate's model to the trials,
``option_costs.py`` has the costs in closed form, ``layers.py`` effects and alternatives, ``budgets.py`` the predicted
front, ``gap.py`` what is proven, and ``verifying.py`` evaluates what was predicted.
"""
