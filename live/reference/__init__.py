"""The reference pair: a small target, EAGLE-3, Medusa and DFlash heads, a draft LM, and the scripts that train them."""
