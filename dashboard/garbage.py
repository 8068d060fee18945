"""Keep Python's search for garbage short: Streamlit asks for a whole one after every interaction."""

from __future__ import annotations

import gc

import streamlit as st


@st.cache_resource(show_spinner=False)
def set_aside(page: str) -> None:
    """Once a page has been drawn, stop looking for garbage among what it left behind.

    That is above all what torch, Altair and Streamlit are made of: it stays, and to look through it takes longer than most
    interactions do.
    """
    gc.collect()
    gc.freeze()
