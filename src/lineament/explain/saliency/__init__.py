"""Which pixels decide? Saliency maps of any method at any site, what they are combined and compared with, and checks of them."""
