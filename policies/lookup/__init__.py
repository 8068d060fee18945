"""Training-free drafters: what they propose is looked up in the text so far. One file per drafter; pure tensor code.

A proposal depends on the committed tokens of its own sequence and on the target's distributions at committed places, and on
nothing else. So replay need not store it: it runs the same code on the recorded text.
"""
