"""The pages of the dashboard, one file each; app.py opens them. What a page shows is computed in sim/."""
