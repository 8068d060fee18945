"""What is measured on a GPU: recordings, recording cost, profiles at true size, fidelity, and policies at true cost."""
