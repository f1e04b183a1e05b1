"""Every setting, and how words become a frozen configuration."""
