"""P4, section 4.3: can an answer be turned by editing a few tokens, and does that survive a rewording?"""
