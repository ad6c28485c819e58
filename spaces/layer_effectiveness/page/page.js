"use strict";
(function () {
  // Plots take the colours of the theme they stand in; Gradio draws them once, for none.
  function colors() {
    const style = getComputedStyle(document.querySelector(".gradio-container") || document.body);
    const color = (name) => style.getPropertyValue(name).trim();
    return { text: color("--ds-text"), muted: color("--ds-muted"), surface: color("--ds-surface"), grid: color("--ds-grid"), line: color("--ds-line") };
  }

  function themed(layout, color) {
    const update = {
      "font.color": color.text,
      "hoverlabel.bgcolor": color.surface,
      "hoverlabel.bordercolor": color.line,
      "hoverlabel.font.color": color.text,
    };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) {
        update[key + ".gridcolor"] = color.grid;
        update[key + ".linecolor"] = color.line;
        if (layout[key].zeroline) update[key + ".zerolinecolor"] = color.muted;
      }
    }
    (layout.annotations || []).forEach((_, index) => {
      update["annotations[" + index + "].font.color"] = color.text;
    });
    // A finger that drags over a plot scrolls the page.
    if (matchMedia("(pointer: coarse)").matches) update.dragmode = false;
    return update;
  }

  function paint() {
    if (!window.Plotly) return;
    const color = colors();
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
      if (!plot.layout || !plot.offsetParent) continue;
      const font = plot.layout.font || {};
      if (font.color !== color.text) window.Plotly.relayout(plot, themed(plot.layout, color));
    }
  }

  // All plots of the results below each other in one picture.
  async function png() {
    const plots = Array.from(document.querySelectorAll("#results .js-plotly-plot")).filter((plot) => plot.offsetParent);
    const ground = getComputedStyle(document.body).backgroundColor;
    const width = 1000;
    const parts = [];
    for (const plot of plots) {
      const column = plot.closest(".column") || plot.parentElement;
      const heading = column.querySelector("h3");
      const height = plot.layout.height || plot.offsetHeight;
      const image = new Image();
      image.src = await window.Plotly.toImage(plot, { format: "png", width, height, scale: 2 });
      await image.decode();
      parts.push({ image, height, title: heading ? heading.textContent : "" });
    }
    const canvas = document.createElement("canvas");
    canvas.width = 2 * width;
    canvas.height = 2 * parts.reduce((sum, part) => sum + part.height + 50, 0);
    const pen = canvas.getContext("2d");
    pen.fillStyle = ground;
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.scale(2, 2);
    let top = 0;
    for (const part of parts) {
      pen.fillStyle = colors().text;
      pen.font = "600 18px system-ui, sans-serif";
      pen.fillText(part.title, 12, top + 32);
      pen.drawImage(part.image, 0, top + 50, width, part.height);
      top += part.height + 50;
    }
    const link = document.createElement("a");
    link.download = "depthscope-plots.png";
    link.href = canvas.toDataURL("image/png");
    link.click();
  }

  window.depthscopePng = png;
  let waiting = 0;
  const soon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(paint, 80);
  };
  function begin() {
    const looked = { childList: true, subtree: true, attributes: true, attributeFilter: ["class", "style"] };
    new MutationObserver(soon).observe(document.body, looked);
  }
  if (document.body) begin();
  else document.addEventListener("DOMContentLoaded", begin);
})();
