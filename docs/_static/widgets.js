// Figures in widgets come from this site; the other modules that widgets need are in embed-amd.js.
if (window.require) require.config({paths: {"jupyter-matplotlib": new URL("assets/jupyter-matplotlib", document.currentScript.src).href}});
// Labels of widgets are typeset as MathJax 2 was asked to.
addEventListener("DOMContentLoaded", () => { if (window.MathJax) MathJax.Hub = {Queue: ([, , element]) => MathJax.typesetPromise?.([element])}; });
