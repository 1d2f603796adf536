"use strict";
// Draws a report's charts by Plotly, shows the map's images, and keeps a live page up to date.
(() => {
  const themes = JSON.parse(document.body.dataset.themes);
  const dark = matchMedia("(prefers-color-scheme: dark)"), touch = matchMedia("(pointer: coarse)");
  const config = {
    displaylogo: false, responsive: true,
    modeBarButtons: [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]], // none sends a chart anywhere
  };
  let printing = false;

  // --- charts ---------------------------------------------------------------------------------

  function draw(plot) {
    const { data, layout } = JSON.parse(plot.dataset.figure), isNew = !plot.on;
    const log = plot.closest("#curves") && document.getElementById("log").checked;
    layout.template = themes[dark.matches && !printing ? "dark" : "light"];
    plot.style.height = `${layout.height}px`; // which Plotly asks when it resizes
    layout.uirevision = 1; // zoom and hidden lines outlive a refresh
    if (log) Object.assign(layout.yaxis ??= {}, { type: "log", uirevision: "log" });
    if (touch.matches) layout.dragmode = false; // a finger scrolls the page
    if (printing) layout.width = plot.clientWidth;
    Plotly.react(plot, data, layout, config);
    if (isNew && plot.closest(".map")) {
      plot.on("plotly_hover", ({ points: [point] }) => show(plot, point));
      plot.on("plotly_unhover", () => hide(plot));
    }
  }
  const each = (change) => document.querySelectorAll(".plot").forEach((plot) => change(plot));
  const drawAll = () => each(draw);
  function print(now) {
    printing = now;
    document.body.classList.toggle("paper", now); // as wide as a sheet, before the browser measures
    drawAll();
    if (!now) each(Plotly.Plots.resize);
  }
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  dark.addEventListener("change", drawAll);
  document.addEventListener("change", ({ target }) => target.id === "log" && drawAll());

  // --- the map's images -----------------------------------------------------------------------

  const thumbnail = (plot) => plot.parentElement.querySelector(".thumbnail");
  function show(plot, { curveNumber, pointNumber }) {
    const sheet = document.getElementById("sheet"), columns = sheet.dataset.columns, side = 96;
    const index = plot.data[curveNumber].customdata[pointNumber], row = Math.floor(index / columns);
    const { x, y } = plot.calcdata[curveNumber][pointNumber], { xaxis, yaxis } = plot._fullLayout;
    const found = thumbnail(plot);
    Object.assign(found.style, {
      background: `url(${sheet.src}) ${-side * (index % columns)}px ${-side * row}px / ${side * columns}px`,
      left: `${Math.min(xaxis._offset + xaxis.d2p(x), plot.clientWidth - side)}px`,
      top: `${plot.offsetTop + yaxis._offset + yaxis.d2p(y) + 24}px`,
    });
    found.hidden = false;
  }
  const hide = (plot) => (thumbnail(plot).hidden = true);
  function read({ target }) {
    if (!target.matches?.(".map input")) return;
    const plot = target.parentElement.querySelector(".plot");
    for (const [curveNumber, { customdata }] of plot.data.entries()) {
      const pointNumber = customdata.indexOf(+target.value), point = { curveNumber, pointNumber };
      if (pointNumber < 0 || plot._fullData[curveNumber].visible !== true) continue;
      Plotly.Fx.hover(plot, [point]); // which tells nobody
      show(plot, point);
    }
  }
  document.addEventListener("input", read);
  document.addEventListener("focusin", read);
  document.addEventListener("keydown", ({ key }) => key === "Escape" && document.querySelectorAll(".map .plot").forEach(hide));

  // --- a live page ----------------------------------------------------------------------------

  // Makes an element like a newer one. What has an id, or holds what has one, stays and is changed
  // within: so focus, place, zoom, and what is open or checked.
  function update(old, fresh) {
    if (fresh.matches(".plot")) {
      if (old.dataset.figure === fresh.dataset.figure) return;
      old.dataset.figure = fresh.dataset.figure;
      old.ariaLabel = fresh.ariaLabel;
      draw(old);
    } else if (!fresh.querySelector("[id]")) {
      if (old.innerHTML !== fresh.innerHTML) old.innerHTML = fresh.innerHTML;
    } else {
      const children = [...fresh.children];
      children.forEach((child, index) => {
        const there = old.children[index], same = child.id && document.getElementById(child.id);
        if (same && same.parentElement === old) {
          if (same !== there) old.insertBefore(same, there);
          update(same, child);
        } else if (there && !there.id && !child.id && there.nodeName === child.nodeName) update(there, child);
        else {
          old.insertBefore(child, there ?? null);
          child.querySelectorAll(".plot").forEach(draw);
        }
      });
      [...old.children].slice(children.length).forEach((rest) => rest.remove());
    }
  }

  const seconds = Number(document.body.dataset.live ?? 0);
  let version = "";
  async function refresh() {
    const status = document.getElementById("live");
    try {
      const reply = await fetch(location.pathname, { headers: { "If-None-Match": version } });
      if (reply.status === 200) {
        const page = new DOMParser().parseFromString(await reply.text(), "text/html");
        for (const id of ["head", "parts", "main"]) update(document.getElementById(id), page.getElementById(id));
        document.title = page.title;
        version = reply.headers.get("ETag");
      } else if (reply.status !== 304) throw new Error(String(reply.status));
      status.textContent = "Live: this page follows the run.";
    } catch {
      status.textContent = "The server has ended: this is what it showed last.";
    }
    setTimeout(refresh, 1000 * seconds);
  }

  drawAll();
  if (seconds) setTimeout(refresh, 1000 * seconds);
})();
