"""The reference pair: a small target, an EAGLE-3 head, Medusa heads and a draft LM, and the scripts that train them."""
