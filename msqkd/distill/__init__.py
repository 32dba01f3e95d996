"""Losses and training steps in which a student network imitates a teacher."""
