"""What the papers print, the rules by which it is judged, and what follows from it by arithmetic."""
